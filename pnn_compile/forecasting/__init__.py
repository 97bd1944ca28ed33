"""What a model would take on N devices, in several ways, by one model of the step."""
