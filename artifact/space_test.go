package artifact

import (
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"syscall"
	"testing"

	"kedge/artifact/archive"
	"kedge/artifact/object"
	"kedge/artifact/treetest"
	"kedge/deployments"
	"kedge/deployments/tooltest"
)

// Directories take space, too: a small index can name more of them than a disk holds.
func TestDirectoriesTakeSpace(t *testing.T) {
	t.Parallel()
	tooltest.NeedRoot(t)
	disk := t.TempDir()
	treetest.MountTmpfs(t, disk, "size=64m,nr_inodes=0")
	x := &archive.Index{}
	for i := range 200_000 {
		x.Entries = append(x.Entries, archive.Entry{Kind: archive.Dir, Path: fmt.Sprint(i), Mode: 0o755})
	}
	f := &fetch{manifest: &deployments.Manifest{}, index: x, tree: &builder{ready: make([]bool, len(x.Entries))}}
	if err := f.checkSpace(disk, 0); !errors.Is(err, syscall.ENOSPC) {
		t.Errorf("200,000 directories on 64 MB: %v", err)
	}
	for want, e := range map[int64]*archive.Entry{
		4096: {Kind: archive.File, Size: 1}, 8192: {Kind: archive.File, Size: 4097}, 0: {Kind: archive.Hardlink, Path: "x"},
	} {
		if got := spaceOf(e); got != want {
			t.Errorf("%+v takes %d bytes, want %d", e, got, want)
		}
	}
}

// A delta that saves nothing isn't fetched: it would take its space beside the archive's.
func TestDeltaAsLargeAsTheArchiveIsPassedOver(t *testing.T) {
	t.Parallel()
	old, new := twoReleases(t)
	m := *new.manifest
	m.Deltas = slices.Clone(m.Deltas)
	if len(m.Deltas) == 0 {
		t.Fatal("there is no delta")
	}
	m.Deltas[0].Size = max(m.Size, deltaInMem+1)
	var log strings.Builder
	dir := t.TempDir()
	opt := StageOptions{Log: slog.New(slog.NewTextHandler(&log, nil))}
	if _, err := fetchIndexed(t.Context(), object.New(object.Config{}), &m, old.asBase(old.dir), dir, opt); err != nil {
		t.Fatal(err)
	}
	treetest.Same(t, dir, new.dir)
	if !strings.Contains(log.String(), "the delta is as large as the archive") {
		t.Errorf("nothing is said of it: %s", log.String())
	}
}
