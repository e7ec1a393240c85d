"""Language models: an embedding, a sequence of blocks, a head. They know nothing of devices, ranks or Lightning."""
