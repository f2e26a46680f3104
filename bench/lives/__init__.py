"""One model, three lives, on one page: trained, fine-tuned three ways, and asked, with the cost of each."""
