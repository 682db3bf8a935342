"""The model: a vision tower, a projector and a language model, joined. Knows no tokenizer, no file of data, no trainer."""
