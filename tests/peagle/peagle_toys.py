"""Packed rows and requests of the P-EAGLE tests: three states a token, positions as the shift leaves them."""

from functools import partial

from drafter_toys import Request, packed_row

MASK, NUM_AUX = 39, 3
packed_batch = partial(packed_row, num_aux=NUM_AUX, first_position=1, supervised=0.8)
request = partial(Request, num_aux=NUM_AUX)
