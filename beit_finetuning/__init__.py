"""End-to-end fine-tuning of image towers, the recipe of BEiT (Bao et al. 2021, section 3.1) as SLIP used it."""
