"""The ReID teacher whose embeddings PSDiff learns to predict."""
