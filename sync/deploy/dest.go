package deploy

import "path/filepath"

// Dest is where what runs lies, for whoever watches it; empty where nothing runs, or without a tree. live is the directory that
// it should lead to: the release's own, or, under a strategy without one, wherever it leads now.
func (u *Unit) Dest() (dest, live string) {
	r, err := u.recall(u.State().Running)
	if err != nil || r == nil || r.Manifest.Src == "" {
		return "", ""
	}
	dir := r.Manifest.Dest
	if l, ok := u.site(r).(linked); ok {
		// Not what dest leads to: somebody may have led it elsewhere meanwhile.
		if dir = l.dir(r); dir == "" {
			return r.Manifest.Dest, ""
		}
	}
	live, _ = filepath.EvalSymlinks(dir)
	return r.Manifest.Dest, live
}
