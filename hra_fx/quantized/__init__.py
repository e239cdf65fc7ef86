"""Linear layers whose weight is quantised: bitsandbytes' and torchao's, neither of which is ever imported here."""
