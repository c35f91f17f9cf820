"""The half of a Triton backend that knows the device: one CPU, one stream."""

import torch
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase

PROPERTIES = {"multiprocessor_count": 1, "max_shared_mem": 1 << 20, "warpSize": 1, "max_num_regs": 1 << 16}


class Utils:
    def get_device_properties(self, device=0):
        return PROPERTIES


class InterpreterDriver(DriverBase):
    def __init__(self):
        self.utils = Utils()

    @staticmethod
    def is_active():
        return True

    def map_python_to_cpp_type(self, type_name):
        return type_name

    def get_current_target(self):
        return GPUTarget("cpu", 0, 1)

    def get_active_torch_device(self):
        return torch.device("cpu")

    def get_benchmarker(self):
        return lambda function, **options: function()

    def get_current_device(self):
        return 0

    def set_current_device(self, device):
        pass

    def get_current_stream(self, device=0):
        return 0

    def get_device_interface(self):
        return torch.cpu

    def get_empty_cache_for_benchmark(self):
        return None

    def clear_cache(self, cache):
        pass
