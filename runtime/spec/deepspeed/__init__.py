"""DeepSpeed's configuration in ours: `importer.import_deepspeed`. Names and defaults are those of DeepSpeed 0.19."""
