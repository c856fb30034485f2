"""Process groups, the device, Megatron-Core without CUDA, and the masked parallel linears."""

from megamask.megatron_range import check_megatron

check_megatron()
