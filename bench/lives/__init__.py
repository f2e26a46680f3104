"""One model, three lives, on one page: trained, fine-tuned three ways, and asked, with its weights, memory and cost in each."""
