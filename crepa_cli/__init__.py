"""Fine-tune video diffusion transformers with Cross-frame Representation Alignment (CREPA, arXiv 2506.09229)."""

__version__ = "0.1.0"
