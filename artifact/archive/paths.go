package archive

import (
	"fmt"
	"strings"

	"kedge/deployments"
)

// CheckPath returns an error unless a path is clean, relative, in the tree, without zero bytes, and within the package
// comment's bounds.
func CheckPath(p string) error {
	if p == "" || len(p) > maxPath || strings.IndexByte(p, 0) >= 0 {
		return fmt.Errorf("the path %q is empty, too long or has a zero byte", clip(p))
	}
	if strings.Count(p, "/") >= MaxLevels {
		return fmt.Errorf("the path %q lies more than %d directories deep", clip(p), MaxLevels-1)
	}
	for part := range strings.SplitSeq(p, "/") {
		if !isName(part) {
			return fmt.Errorf("the path %q is absolute, leaves the tree, is not clean, or has a name over %d bytes",
				clip(p), maxName)
		}
	}
	return nil
}

// isName reports whether a part of a path is a name that a file can have.
func isName(part string) bool {
	return part != "" && part != "." && part != ".." && len(part) <= maxName && strings.IndexByte(part, 0) < 0
}

// CheckTargets returns an error if CheckTarget does for a symbolic link of the index.
func (x *Index) CheckTargets(allowed deployments.Symlinks) error {
	for i := range x.Entries {
		if e := &x.Entries[i]; e.Kind == Symlink {
			if err := CheckTarget(e.Path, e.Target, allowed); err != nil {
				return err
			}
		}
	}
	return nil
}

// checkTargetText returns an error unless a text can be a symbolic link's target.
func checkTargetText(p, target string) error {
	if target == "" || len(target) >= maxPath || strings.IndexByte(target, 0) >= 0 {
		return fmt.Errorf("the target of the symbolic link %q is empty, too long or has a zero byte", clip(p))
	}
	return nil
}

// CheckTarget returns an error unless target can be the target of a symbolic link at p, and leads to a path in the
// tree. With SymlinksAny it may lead anywhere. Other links on its way need not be resolved: its ".." must come first,
// and only real directories lie above p.
func CheckTarget(p, target string, allowed deployments.Symlinks) error {
	if err := checkTargetText(p, target); err != nil || allowed == deployments.SymlinksAny {
		return err
	}
	if strings.HasPrefix(target, "/") {
		return fmt.Errorf(
			"the symbolic link %q leads out of the tree, to %q: refused, unless the manifest says symlinks: any",
			clip(p),
			clip(target),
		)
	}
	depth, climbing := strings.Count(p, "/"), true
	for part := range strings.SplitSeq(target, "/") {
		switch part {
		case "..":
			if depth--; depth < 0 || !climbing {
				return fmt.Errorf(
					"the symbolic link %q leads out of the tree, or may do so, to %q: refused, unless the manifest says "+
						"symlinks: any",
					clip(p),
					clip(target),
				)
			}
		case "", ".":
		default:
			climbing = false
		}
	}
	return nil
}
