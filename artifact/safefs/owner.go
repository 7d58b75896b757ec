package safefs

import (
	"fmt"
	"math"
	"os/user"
	"strconv"
	"strings"
)

// LookupOwner resolves a manifest's owner, which is USER, USER:GROUP or :GROUP with names or numbers. An ID is -1 if
// owner doesn't name it, which means that it shall not be changed. With an error, both are -1.
func LookupOwner(owner string) (uid, gid int, err error) {
	name, group, _ := strings.Cut(owner, ":")
	uid, err = idOf(name, func() (string, error) { return LookupUID(name) })
	if err == nil {
		gid, err = idOf(group, func() (string, error) { return LookupGID(group) })
	}
	if err != nil {
		return -1, -1, fmt.Errorf("owner %q: %w", owner, err)
	}
	return uid, gid, nil
}

// LookupUID returns the ID, in decimal, of the user called name.
func LookupUID(name string) (uid string, err error) {
	u, err := user.Lookup(name)
	if err != nil {
		return "", err
	}
	return u.Uid, nil
}

// LookupGID returns the ID, in decimal, of the group called name.
func LookupGID(name string) (gid string, err error) {
	g, err := user.LookupGroup(name)
	if err != nil {
		return "", err
	}
	return g.Gid, nil
}

// idOf returns the number in name, or the one that lookup returns if name isn't numeric. It returns -1 for an empty
// name. With an error the number means nothing.
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
	if err != nil || id == math.MaxUint32 {
		// the kernel takes MaxUint32 for "no change", and larger numbers modulo 2^32
		return -1, fmt.Errorf("the number of a user or group is at most %d", uint32(math.MaxUint32-1))
	}
	return int(id), nil
}
