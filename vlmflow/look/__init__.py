"""Looking at datasets: statistics, gallery, differences and the way of one sample, for millions of rows without loading them."""
