"""Process groups, the device, Megatron-Core without CUDA, and the masked parallel linears."""
