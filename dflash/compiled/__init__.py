"""What the TPU's own compiler says of our programs, on a machine without a TPU. Everything here is an estimate."""
