package artifact

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"math"
	"os"
	"os/user"
	"strconv"
	"strings"
	"syscall"
)

// ownerOf resolves a manifest's owner; -1: leave it unchanged.
func ownerOf(owner string) (uid, gid int, err error) {
	name, group, _ := strings.Cut(owner, ":")
	uid, err = idOf(name, func() (string, error) { return lookupUser(name) })
	if err == nil {
		gid, err = idOf(group, func() (string, error) { return lookupGroup(group) })
	}
	if err != nil {
		return -1, -1, fmt.Errorf("owner %q: %w", owner, err)
	}
	return uid, gid, nil
}

func lookupUser(name string) (uid string, err error) {
	u, err := user.Lookup(name)
	if err != nil {
		return "", err
	}
	return u.Uid, nil
}

func lookupGroup(name string) (gid string, err error) {
	g, err := user.LookupGroup(name)
	if err != nil {
		return "", err
	}
	return g.Gid, nil
}

// idOf parses a numeric ID, or looks up a name. An error comes with the ID -1.
func idOf(name string, lookup func() (string, error)) (int, error) {
	if name == "" {
		return -1, nil
	}
	if strings.Trim(name, "0123456789") != "" {
		var err error
		if name, err = lookup(); err != nil {
			return -1, err
		}
	}
	id, err := strconv.ParseUint(name, 10, 32)
	if err == nil && id == math.MaxUint32 {
		// the kernel takes it for "no change", and larger numbers modulo 2^32
		err = errors.New("chown(2) takes this number for \"no change\"")
	}
	return int(id), err
}

// eachWrongOwner calls f for each path that has another owner, including the top as ".". It skips the paths of
// skip.
func eachWrongOwner(ctx context.Context, root *os.Root, uid, gid int, skip []string, f func(p string) error) error {
	return fs.WalkDir(root.FS(), ".", func(p string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if err := ctx.Err(); err != nil {
			return err
		}
		if isBelow(p, skip) {
			if d.IsDir() {
				return fs.SkipDir
			}
			return nil
		}
		if d.IsDir() && strings.Count(p, "/") >= maxLevels {
			return fs.SkipDir // no release is so deep: its owner made it
		}
		info, err := d.Info()
		if err != nil {
			return err
		}
		st, ok := info.Sys().(*syscall.Stat_t)
		if !ok || (uid < 0 || int(st.Uid) == uid) && (gid < 0 || int(st.Gid) == gid) {
			return nil
		}
		return f(p)
	})
}

// applyOwner gives a tree to its manifest's owner. Files hard-linked to a live release have that owner already.
func applyOwner(ctx context.Context, dir, owner string) error {
	if owner == "" {
		return nil
	}
	uid, gid, err := ownerOf(owner)
	if err != nil {
		return err
	}
	root, err := os.OpenRoot(dir)
	if err != nil {
		return err
	}
	defer root.Close()
	err = eachWrongOwner(ctx, root, uid, gid, nil, func(p string) error { return root.Lchown(p, uid, gid) })
	if err != nil {
		return fmt.Errorf("owner %q: %w", owner, err)
	}
	return nil
}

func verifyOwner(ctx context.Context, dir, owner string, skip []string) (found []Difference, err error) {
	if owner == "" {
		return nil, nil
	}
	uid, gid, err := ownerOf(owner)
	if err != nil {
		return nil, err
	}
	root, err := os.OpenRoot(dir)
	if err != nil {
		return nil, err
	}
	defer root.Close()
	err = eachWrongOwner(ctx, root, uid, gid, skip, func(p string) error {
		found = append(found, Difference{Path: p, What: "owner"})
		return nil
	})
	return found, err
}
