"""Models: layers over the kernels. One file a family; a model is a function of StepKernels."""
