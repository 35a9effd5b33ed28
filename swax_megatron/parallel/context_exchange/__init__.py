"""What ranks that share a row tell each other: window halos of attention layers, memories of mLSTM layers."""
