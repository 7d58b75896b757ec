package mirror

import (
	"errors"

	"kedge/deployments"
	"kedge/sync/git"
)

// loadUnvouched reads the commit that was mirrored last though its signature doesn't count, and nothing remembers that
// it once did: its signer was taken out, and this mirror has no cache from before. The store says which commit that
// was, and is no proof: see recorded.
func (m *Mirror) loadUnvouched(hash string) (*git.Commit, error) {
	from, err := m.branch.Objects()
	if err != nil {
		return nil, err
	}
	defer from.Close()
	return from.LoadTaken(hash, nil)
}

// recallUnvouched reads the commit that the store holds, for orders, where refused is about its signature alone.
func (l *leader) recallUnvouched(taken string, refused error) bool {
	if !errors.As(refused, new(*git.BadCommit)) {
		return false
	}
	commit, err := l.loadUnvouched(taken)
	if err != nil {
		return false
	}
	if l.acceptance.unvouched != nil {
		return true
	}
	l.acceptance.unvouched = commit
	l.c.Log.Warn("the commit that was mirrored last bears no signature that counts any more: orders, pins and rollouts "+
		"go on, and changes by hand stay until a commit is taken", "commit", taken, "error", refused)
	return true
}

// basis returns the commit that the store is kept up by; vouched is whether its signature counted. Nil: none is known.
func (l *leader) basis(cells map[deployments.UnitID]cell) (commit *git.Commit, vouched bool) {
	switch a := &l.acceptance; {
	case a.commit != nil:
		return a.commit, true
	case a.unvouched != nil:
		return recorded(a.unvouched, cells, l.written.records), false
	}
	return nil, false
}

// recorded returns the commit with those units alone whose records are about the releases that it names, and with what
// the records say in place of what their files say. So nobody's signature is needed for it: it gives nodes nothing that
// the store doesn't say already, and tells only how rollouts go on. Pure.
func recorded(commit *git.Commit, cells map[deployments.UnitID]cell, own map[deployments.UnitID]writtenRecord) *git.Commit {
	kept := *commit
	tree := *commit.Tree
	kept.Tree, tree.Units = &tree, nil
	for _, u := range commit.Tree.Units {
		c, mine := cells[u.ID], own[u.ID]
		record, present := c.record, c.present && c.err == nil
		if mine.value != nil {
			record, present = mine.record, true
		}
		if !present || !ours(record) || record.Orphaned || !isAbout(record, u.Release) {
			continue
		}
		u.After, u.Drift, u.Adopt = record.After, record.Drift, record.Adopt
		tree.Units = append(tree.Units, u)
	}
	return &kept
}

// isAbout reports whether a record stands for a release that Git names: as its target, as what was rolled back, or as
// what its pin took the place of.
func isAbout(r deployments.Record, release deployments.Pointer) bool {
	if r.Pinned != nil {
		return r.Pinned.Target == release || !r.Pinned.Failed.IsZero() && r.Pinned.Failed == release.Digest
	}
	return goal(r, release) == release
}
