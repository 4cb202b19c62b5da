"""The guided sampler: a surrogate, corrected by every measurement, screens proposals."""
