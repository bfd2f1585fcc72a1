"""vlmtune: fine-tune vision-language models from one Python config file."""

__version__ = '0.1.0'
