"""What two kernels share: the chips, the launch plan, masks, online softmax, activations."""
