"""SWAX pretraining: mLSTM and sliding-window attention layers on Megatron-core, DeepSpeed ZeRO and webdataset shards."""

__version__ = "0.1.0"
