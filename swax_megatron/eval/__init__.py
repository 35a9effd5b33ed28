"""What a trained model remembers: RULER, recall by gap, perplexity by position, and how runs compare."""
