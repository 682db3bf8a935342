"""From files to batches: tokenizer, prompt, image, dataset, mixture, sampler, collate, datamodule; and their doctor."""
