"""AdvDMD, DMD2 and TwinFlow: one page each, and the losses that they share."""
