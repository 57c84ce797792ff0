"""The RDMA provider: InfiniBand and RoCE through libibverbs."""
