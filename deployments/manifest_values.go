package deployments

import (
	"encoding/hex"
	"fmt"
	"path"
	"path/filepath"
	"regexp"
	"strings"
	"time"
)

// asURL makes a URL absolute against the manifest's own URL. A relative URL can't lead out of the host or bucket.
func (r *manifestReader) asURL(s string) (string, error) {
	s = PlainURL(s)
	if !strings.Contains(s, "://") {
		scheme, rest, ok := strings.Cut(r.url, "://")
		if !ok || s == "" {
			return "", fmt.Errorf("%q is relative, and the manifest has no URL of its own", clip(s))
		}
		if strings.HasPrefix(s, "/") {
			return "", fmt.Errorf("%q: want a URL, or a path relative to the manifest's", clip(s))
		}
		rest, _, _ = strings.Cut(rest, "?")
		host, at, _ := strings.Cut(rest, "/")
		dir := parentOf(at) // not cleaned: in a bucket, a//b is not a/b
		s = path.Clean(s)
		for up := true; up; {
			if s, up = strings.CutPrefix(s, "../"); up {
				dir = parentOf(strings.TrimSuffix(dir, "/"))
			}
		}
		s = scheme + "://" + host + "/" + dir + s
	}
	return s, CheckSourceURL(s)
}

// parentOf returns a path up to and including its last slash; empty: the path has no slash.
func parentOf(at string) string { return at[:strings.LastIndexByte(at, '/')+1] }

// asShown parses a name or version. People see it, and it becomes part of a directory's name and of
// a URL.
func asShown(s string) (string, error) {
	if len(s) > 128 || !shown.MatchString(s) {
		return "", fmt.Errorf(
			"%q: want 1 to 128 letters, digits, '.', '_', '+', '~' or '-', beginning with a letter or digit",
			clip(s),
		)
	}
	return s, nil
}

// Lengths are checked outside of the expressions: Go compiles a bounded repetition to as many copies.
var (
	shown        = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9._+~-]*$`)
	variableName = regexp.MustCompile(`^[A-Za-z_][A-Za-z0-9_]*$`)
	owner        = regexp.MustCompile(`^[A-Za-z0-9_][A-Za-z0-9_.-]*$`)
)

// isOwner reports whether s can be the name or number of a user or a group.
func isOwner(s string) bool { return len(s) <= 64 && owner.MatchString(s) }

func asCreated(s string) (time.Time, error) {
	t, err := time.Parse("2006-01-02T15:04:05Z", s)
	if err != nil {
		return time.Time{}, fmt.Errorf("created %q: want a time in UTC, as in 2026-11-24T09:00:00Z", clip(s))
	}
	return t, nil
}

func asChecksum(s string) (string, error) {
	s = strings.ToLower(s)
	if _, err := hex.DecodeString(s); err != nil {
		return "", fmt.Errorf("checksum %q: want 32, 40, 64 or 128 hexadecimal digits", clip(s))
	}
	switch len(s) {
	case 32, 40, 64, 128:
		return s, nil
	}
	return "", fmt.Errorf("the checksum has %d digits: want an md5 (32), sha1 (40), sha256 (64) or sha512 (128)", len(s))
}

func asDest(s string) (string, error) {
	if !strings.HasPrefix(s, "/") || filepath.Clean(s) == "/" || strings.ContainsAny(s, "\x00\n") {
		return "", fmt.Errorf("dest %q: want an absolute path, as in /srv/app", clip(s))
	}
	return filepath.Clean(s), nil
}

// asShared reads a path within the tree for Manifest.Shared.
func asShared(s string) (string, error) {
	clean := path.Clean(s)
	if !filepath.IsLocal(s) || clean == "." || len(s) > 1024 || strings.ContainsAny(s, "\x00\n") {
		return "", fmt.Errorf("shared %q: want a path within the tree, as in log or public/uploads", clip(s))
	}
	return clean, nil
}

// nested reports whether two of the paths are equal, or one lies below another.
func nested(paths []string) bool {
	for i, p := range paths {
		for j, q := range paths {
			if i != j && strings.HasPrefix(p+"/", q+"/") {
				return true
			}
		}
	}
	return false
}

func asOwner(s string) (string, error) {
	user, group, both := strings.Cut(s, ":")
	if user != "" && !isOwner(user) || both && !isOwner(group) || user == "" && !both {
		return "", fmt.Errorf("owner %q: want USER, USER:GROUP or :GROUP", clip(s))
	}
	return s, nil
}

func asUser(s string) (string, error) {
	if !isOwner(s) {
		return "", fmt.Errorf("user %q: want a user's name or number", clip(s))
	}
	return s, nil
}

func asHTTP(s string) (string, error) {
	if !strings.HasPrefix(s, "http://") && !strings.HasPrefix(s, "https://") {
		return "", fmt.Errorf("%q: want http:// or https://", clip(ShownURL(s)))
	}
	return s, nil
}

func asPositive(s string) (time.Duration, error) {
	d, err := asDuration(s)
	if err == nil && d == 0 {
		err = fmt.Errorf("%q: want a duration longer than 0", clip(s))
	}
	return d, err
}
