package artifact

import (
	"context"
	"fmt"
	"io/fs"
	"os"
	"os/user"
	"strconv"
	"strings"
	"syscall"
)

// ownerOf resolves a manifest's owner; -1: leave it as it is.
func ownerOf(owner string) (uid, gid int, err error) {
	uid, gid = -1, -1
	name, group, _ := strings.Cut(owner, ":")
	if name != "" {
		if uid, err = strconv.Atoi(name); err != nil {
			u, err := user.Lookup(name)
			if err != nil {
				return -1, -1, fmt.Errorf("owner %q: %w", owner, err)
			}
			if uid, err = strconv.Atoi(u.Uid); err != nil {
				return -1, -1, fmt.Errorf("owner %q: %w", owner, err)
			}
		}
	}
	if group != "" {
		if gid, err = strconv.Atoi(group); err != nil {
			g, err := user.LookupGroup(group)
			if err != nil {
				return -1, -1, fmt.Errorf("owner %q: %w", owner, err)
			}
			if gid, err = strconv.Atoi(g.Gid); err != nil {
				return -1, -1, fmt.Errorf("owner %q: %w", owner, err)
			}
		}
	}
	return uid, gid, nil
}

// eachWrongOwner calls f for what belongs to somebody else, the top included as ".".
func eachWrongOwner(ctx context.Context, root *os.Root, uid, gid int, f func(p string) error) error {
	return fs.WalkDir(root.FS(), ".", func(p string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if err := ctx.Err(); err != nil {
			return err
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

// applyOwner gives a tree to its manifest's owner. What a hard link shares with a live release has that owner already.
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
	err = eachWrongOwner(ctx, root, uid, gid, func(p string) error { return root.Lchown(p, uid, gid) })
	if err != nil {
		return fmt.Errorf("owner %q: %w", owner, err)
	}
	return nil
}

func verifyOwner(ctx context.Context, dir, owner string) (found []Difference, err error) {
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
	err = eachWrongOwner(ctx, root, uid, gid, func(p string) error {
		found = append(found, Difference{Path: p, What: "owner"})
		return nil
	})
	return found, err
}
