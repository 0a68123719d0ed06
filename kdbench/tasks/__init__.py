"""Tasks, one file each: data, batches and generated responses; names are file names."""
