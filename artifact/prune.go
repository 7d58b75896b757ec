package artifact

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"kedge/artifact/safefs"
	"kedge/deployments"
)

// Prune removes old releases. It keeps the current one and those in protect. Of all others it keeps the newest, as many
// as keep says. It also removes partly staged trees, except those of releases in protect. If dest can't be read, it
// removes nothing and returns the error. A release with a mount in it stays, and the error wraps safefs.ErrMounted.
func (r *Releases) Prune(keep int, protect ...deployments.Digest) error {
	return r.pruneBut(keep, protect, nil)
}

// pruneBut is Prune, but also removes the releases in drop that are neither current nor in protect. These don't count
// towards keep.
func (r *Releases) pruneBut(keep int, protect, drop []deployments.Digest) error {
	if err := r.prune(keep, protect, drop); err != nil {
		return fmt.Errorf("prune %s: %w", r.shownTop(), err)
	}
	return nil
}

func (r *Releases) prune(keep int, protect, drop []deployments.Digest) error {
	r, leave, err := r.enter(false)
	if errors.Is(err, ErrNoRelease) {
		return nil
	}
	if err != nil {
		return err
	}
	defer leave()
	live, rec, err := r.current()
	if err != nil && !errors.Is(err, ErrNoRelease) {
		return err
	}
	liveDir, _ := filepath.EvalSymlinks(r.link()) // found even if the live release's record is damaged
	names, err := r.names()
	if err != nil {
		return err
	}
	among := func(list []deployments.Digest, short string) bool {
		return slices.ContainsFunc(list, func(d deployments.Digest) bool { return d.Short() == short })
	}
	protected := func(short string) bool { return among(protect, short) }
	var left error
	kept := map[string]bool{}
	others := 0
	var files *keptStats
	removes := false
	for _, name := range names {
		short := name[max(0, len(name)-12):]
		dir := filepath.Join(r.top(), name)
		switch real, err := filepath.EvalSymlinks(dir); {
		case live != nil && filepath.Base(live.Dir) == name, liveDir != "" && err == nil && real == liveDir, protected(short):
			kept[short] = true
			continue
		}
		if _, err := os.Lstat(dir); err == nil && !among(drop, short) {
			if others++; others <= keep {
				kept[short] = true
				continue
			}
		}
		if !removes {
			files, removes = r.keepStats(live, rec), true
		}
		err := r.remove(name)
		if errors.Is(err, safefs.ErrMounted) {
			kept[short], left = true, errors.Join(left, err)
			continue
		}
		if err != nil {
			return err
		}
	}
	entries, err := os.ReadDir(r.private())
	if errors.Is(err, fs.ErrNotExist) {
		return left
	}
	if err != nil {
		return err
	}
	for _, e := range entries {
		name := e.Name()
		staging, isStaging := strings.CutPrefix(name, stagingPrefix)
		staging, _, _ = strings.Cut(staging, deltaSuffix)
		staging, _, _ = strings.Cut(staging, archiveSuffix)
		healed, isHealed := strings.CutPrefix(name, healPrefix)
		indexed, isIndex := strings.CutSuffix(name, indexSuffix)
		switch {
		case isIndex && !strings.HasPrefix(name, unfinishedPrefix) && !protected(indexed[max(0, len(indexed)-12):]) &&
			!safefs.Exists(filepath.Join(r.private(), indexed+recordSuffix)):
			// staging was killed before it wrote the record, or remove after it removed the record
			left = errors.Join(left, safefs.RemoveTree(filepath.Join(r.private(), name)))
		case strings.HasSuffix(name, recordSuffix),
			isIndex,
			strings.HasSuffix(name, changesSuffix), strings.HasSuffix(name, beforeSuffix),
			// a version may begin with one of the prefixes below
			strings.HasSuffix(name, statsSuffix) && !strings.HasPrefix(name, unfinishedPrefix):
		case strings.HasPrefix(name, trashPrefix),
			isStaging && !protected(staging),
			isHealed && !kept[healed],
			strings.HasPrefix(name, unfinishedPrefix):
			left = errors.Join(left, safefs.RemoveTree(filepath.Join(r.private(), name)))
		}
	}
	if err := files.saveNewCtimes(); err != nil {
		r.log.Warn("could not record the times of the live release's files: they are hashed again before they are reused",
			"dest", r.dest, "error", err)
	}
	return left
}

// remove removes the release whose directory is called name. It first renames the directory, so that no half-removed
// release is ever found. If something is mounted there, it removes nothing, and the error wraps safefs.ErrMounted.
func (r *Releases) remove(name string) error {
	dir := filepath.Join(r.top(), name)
	if err := safefs.NoMounts(dir); err != nil {
		return err
	}
	trash := filepath.Join(r.private(), trashPrefix+name)
	if err := safefs.RemoveTree(trash); err != nil {
		return err
	}
	r.reachStep("trash")
	if err := makeMovable(dir); err != nil {
		return err
	}
	if err := os.Rename(dir, trash); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	r.reachStep("trashed")
	for _, suffix := range []string{statsSuffix, changesSuffix, beforeSuffix, recordSuffix, indexSuffix} {
		if err := os.Remove(filepath.Join(r.private(), name+suffix)); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	return safefs.RemoveTree(trash)
}
