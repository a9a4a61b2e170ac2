"""A task of your own: any module, any loss, from tensors or from data sets."""
