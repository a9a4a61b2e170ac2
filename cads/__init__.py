"""cads: what should I train on, given a pool, a validation set, a model and a compute budget in FLOPs?"""
