"""speechkit: audio and speech models in which the model you train is the model you stream."""
