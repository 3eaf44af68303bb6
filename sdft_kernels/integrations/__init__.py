"""The loss in the trainers and the losses of others: TRL's trainers (`trl`), Liger's losses (`liger`)."""
