"""Serves one engine of this process over OpenAI's interface. Start at `app.LocalServer`; FastAPI and uvicorn come with
`pip install 'speculators[serve-local]'`."""
