"""Parts that know nothing of the method: files, devices, processes, messages, pictures."""
