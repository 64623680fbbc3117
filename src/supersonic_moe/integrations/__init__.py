"""The experts in the shape that trainers of other projects expect."""
