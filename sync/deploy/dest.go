package deploy

// Dest is where what runs lies, for whoever watches it; empty where nothing runs, or without a tree.
func (u *Unit) Dest() string {
	r, err := u.recall(u.State().Running)
	if err != nil || r == nil || r.Manifest.Src == "" {
		return ""
	}
	return r.Manifest.Dest
}
