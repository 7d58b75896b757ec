package mirror

import (
	"context"
	"fmt"
	"log/slog"
	"maps"
	"slices"
	"strings"
	"time"

	"kedge/deployments"
	"kedge/kv"
	"kedge/sync/git"
)

// Agents, and this mirror, tell a missing key from a lost permission by folder keys. People delete these with the
// keys below them, so they are made again if a watch lacks one.

// topFolders are the folder keys that any fleet needs, roleFolders the kinds of folder key that each role needs.
var (
	topFolders = []string{
		kv.DesiredPrefix,
		kv.PinsPrefix,
		kv.ControlPrefix,
		kv.StatusPrefix,
		kv.HistoryPrefix,
		kv.MirrorPrefix,
	}
	roleFolders = []string{kv.DesiredPrefix, kv.PinsPrefix, kv.StatusPrefix, kv.ControlPrefix, kv.HistoryPrefix}
)

// folderLag is how long a folder key may take to show in a watch before it is made again.
const folderLag = time.Second

// folderKeeper makes the folder keys.
type folderKeeper struct {
	store kv.Store
	log   *slog.Logger
	made  map[string]time.Time // when each key was last made
	late  bool                 // a key that was made has yet to show in a watch
}

// missingFolders returns the folder keys to make. If this mirror never made a key of a role, or a watch lacks one, all
// of the role's keys are returned: some aren't watched. So are topFolders if a watch lacks one. made has the time at
// which each key was last made. Keys made less than folderLag ago may have yet to show: they are left out, late is set,
// and the caller has to look again.
func missingFolders(
	roles []deployments.RoleID,
	seen map[string]observedFolders,
	made map[string]time.Time,
	now time.Time,
) (missing []string, late bool) {
	lacks := func(keys []string, lost func(string) bool) {
		if !slices.ContainsFunc(keys, lost) {
			return
		}
		for _, key := range keys {
			if now.Sub(made[key]) >= folderLag {
				missing = append(missing, key)
			} else {
				late = true
			}
		}
	}
	lacks(topFolders, func(kind string) bool { return seen[kind].kindMissing })
	for _, r := range roles {
		var keys []string
		for _, kind := range roleFolders {
			keys = append(keys, kv.RolePrefix(kind, r.Stage, r.Role))
		}
		lacks(keys, func(key string) bool {
			kind, _, _ := strings.Cut(key, "/")
			folders := seen[kind+"/"]
			_, shown := slices.BinarySearch(folders.keys, key)
			return made[key].IsZero() || folders.kindMissing || folders.keys != nil && !shown
		})
	}
	return missing, late
}

// ensure makes the folder keys that are missing.
func (f *folderKeeper) ensure(ctx context.Context, commit *git.Commit, seen map[string]observedFolders,
	now time.Time) error {
	missing, late := missingFolders(rolesOf(commit.Tree), seen, f.made, now)
	f.late = late
	if len(missing) == 0 {
		return nil
	}
	if err := f.store.EnsureFolders(ctx, missing...); err != nil {
		return fmt.Errorf("making folder keys (%d, the first is %s): %w", len(missing), missing[0], err)
	}
	for _, key := range missing {
		if !f.made[key].IsZero() {
			f.log.Warn("folder keys were missing: made sure that this one exists", "key", key)
		}
		f.made[key] = now
	}
	return nil
}

// rolesOf lists the roles of a tree, sorted.
func rolesOf(tree *deployments.Tree) []deployments.RoleID {
	seen := map[deployments.RoleID]bool{}
	for _, u := range tree.Units {
		seen[u.ID.RoleID()] = true
	}
	return slices.SortedFunc(maps.Keys(seen), deployments.RoleID.Compare)
}
