"""Every language model class of transformers, shrunk to a tiny random model and compared with our results on it."""
