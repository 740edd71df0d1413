"""The timeline of some steps of a job: what each rank does and waits for, recorded while it trains."""
