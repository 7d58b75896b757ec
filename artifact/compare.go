package artifact

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"

	"kedge/artifact/safefs"
)

// compareDest returns how the tree at rel's dest, whoever put it there, differs from the release's
// tree, which is unpacked at tree. place is dest's parent directory. compareDest compares type,
// content, mode and link, and the owner if the manifest names one. It skips shared paths and
// mounts. If dest is missing, or no directory, that is the only difference.
func compareDest(
	ctx context.Context,
	place *safefs.Place,
	rel *Release,
	tree string,
	limit int64,
) ([]Difference, error) {
	dest := place.Path(filepath.Base(rel.Manifest.Dest))
	info, err := os.Stat(dest)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return []Difference{{Path: ".", What: "missing"}}, nil
	case err != nil:
		return nil, fmt.Errorf("comparing %s: %w", rel.Manifest.Dest, err)
	case !info.IsDir():
		return []Difference{{Path: ".", What: "type"}}, nil
	}
	index, err := indexOfTree(ctx, tree)
	if err != nil {
		return nil, err
	}
	skip, err := safefs.MountsBelow(dest)
	if err != nil {
		return nil, err
	}
	skip = append(skip, rel.Manifest.Shared...)
	differences, _, err := verifyTree(ctx, dest, index, limit, skip...)
	if err != nil {
		return nil, err
	}
	if info.Mode()&dirBits != rel.Manifest.DestMode { // an index has no entry for the top directory
		differences = append([]Difference{{Path: ".", What: "mode"}}, differences...)
	}
	owners, err := verifyOwner(ctx, dest, rel.Manifest.Owner, skip, nil)
	return append(differences, owners...), err
}

// Occupied reports whether a file, or a directory that is not empty, exists at dest. It follows a link at dest.
func Occupied(dest string) (bool, error) {
	info, err := os.Stat(dest)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return false, nil
	case err != nil:
		return false, fmt.Errorf("looking at %s: %w", dest, err)
	case !info.IsDir():
		return true, nil
	}
	dir, err := os.Open(dest)
	if err != nil {
		return false, fmt.Errorf("looking into %s: %w", dest, err)
	}
	defer dir.Close()
	names, err := dir.Readdirnames(1)
	if err != nil && !errors.Is(err, io.EOF) {
		return false, fmt.Errorf("looking into %s: %w", dest, err)
	}
	return len(names) > 0, nil
}

func (commandsOnly) Compare(context.Context, *Release, int64) ([]Difference, error) { return nil, nil }

func (l linkSwitcher) Compare(ctx context.Context, rel *Release, limit int64) ([]Difference, error) {
	found, err := l.releases.Find(rel.Pointer.Digest)
	if err != nil {
		return nil, err
	}
	place, err := safefs.OpenPlace(rel.Manifest.Dest,
		safefs.PlaceOptions{Within: l.releases.within, Owner: rel.Manifest.Owner})
	if err != nil {
		return nil, err
	}
	defer place.Close()
	return compareDest(ctx, place, rel, found.Dir, limit)
}

// Compare asks rsync for the differences, as the manifest's excludes are rsync patterns.
func (s rsyncSwitcher) Compare(ctx context.Context, rel *Release, limit int64) ([]Difference, error) {
	ds, err := s.Verify(ctx, rel, limit)
	if errors.Is(err, fs.ErrNotExist) {
		return []Difference{{Path: ".", What: "missing"}}, nil
	}
	return ds, err
}

func (m moveSwitcher) Compare(ctx context.Context, rel *Release, limit int64) ([]Difference, error) {
	place, err := m.openParent(rel)
	if errors.Is(err, fs.ErrNotExist) {
		return []Difference{{Path: ".", What: "missing"}}, nil
	}
	if err != nil {
		return nil, err
	}
	defer place.Close()
	return compareDest(ctx, place, rel, m.tree(rel), limit)
}
