"""What the models are built from: event embeddings, packed encoders, pooling, experts, fast linear layers, dropout."""
