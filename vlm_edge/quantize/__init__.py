"""Quantisation as graph passes: weight-only 4/8 bits (`weight_only`), int8 with dynamic or calibrated ranges (`dynamic`,
`static`), embedding tables (`embedding`); the arithmetic stands in `blockwise` and `channelwise`. No torch.
"""
