package artifact

import (
	"context"
	"fmt"
	"path/filepath"
	"slices"

	"kedge/artifact/safefs"
)

// stagingWouldMend reports whether staging a release anew would remove any of these differences of
// its tree. If that can't be found out, it returns true.
func (r *Releases) stagingWouldMend(rel *Release, differences []Difference) bool {
	r, leave, err := r.enter(false)
	if err != nil {
		return true
	}
	defer leave()
	gone := unrestorable(readChanges(r.changeRecord(filepath.Base(rel.Dir)).made), differences)
	return slices.ContainsFunc(differences, func(d Difference) bool { return !gone[d.Path] })
}

// uncompared reports whether a tree could not be compared, as its index is missing or damaged.
func uncompared(found []Difference) bool {
	return slices.ContainsFunc(found, func(d Difference) bool { return d.What == "index" })
}

// RecordBefore records how a release's tree differs from its index before its commands run, so that
// these differences aren't taken for the commands' own. If they are recorded already, or the index
// is missing or damaged, it does nothing.
func (r *Releases) RecordBefore(ctx context.Context, rel *Release) error {
	r, leave, err := r.enter(false)
	if err != nil {
		return fmt.Errorf("recording the tree of %s before its commands: %w", rel.Dir, err)
	}
	defer leave()
	files := r.changeRecord(filepath.Base(rel.Dir))
	if safefs.Exists(files.before) {
		return nil
	}
	found, _, err := r.differences(ctx, rel, verification{quick: true})
	if err == nil && !uncompared(found) {
		err = files.recordBefore(r.dirOf(rel), found)
	}
	if err != nil {
		return fmt.Errorf("recording the tree of %s before its commands: %w", rel.Dir, err)
	}
	return nil
}

// RecordAfter records what the release's commands made, changed and removed in its tree. From then on, these changes
// belong to the release. If the index is missing or damaged, nothing is recorded.
func (r *Releases) RecordAfter(ctx context.Context, rel *Release) error {
	r, leave, err := r.enter(false)
	if err != nil {
		return fmt.Errorf("recording what the commands of %s made: %w", rel.Dir, err)
	}
	defer leave()
	found, more, err := r.differences(ctx, rel, verification{quick: true, raw: true})
	if err == nil && !uncompared(found) {
		var left int
		left, err = r.changeRecord(filepath.Base(rel.Dir)).recordAfter(r.dirOf(rel), found)
		if left += more; err == nil && left > 0 {
			r.log.Warn("the release's commands made more paths than kedge records: the others count as drift",
				"dir", rel.Dir, "recorded", maxChanges, "left_out", left)
		}
	}
	if err != nil {
		return fmt.Errorf("recording what the commands of %s made: %w", rel.Dir, err)
	}
	return nil
}
