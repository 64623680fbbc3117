"""The experts in the shape that trainers and serving stacks of other projects expect."""
