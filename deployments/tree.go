package deployments

import (
	"fmt"
	"io/fs"
	"strings"
)

// Tree is a whole commit of a deployments repo: valid, or not a Tree.
type Tree struct {
	Settings Settings
	// Units are sorted by stage, role and unit.
	Units []Unit
}

// Load reads a commit's tree: kedge.yaml (all defaults where it is missing), and every STAGE/ROLE/UNIT.yaml. Dot-files, README*
// and other files outside that shape without .yaml or .yml endings are passed over; a .yaml file in a wrong place is a problem.
// The error is Problems, every one found, each with its place.
func Load(fsys fs.FS) (*Tree, error) { return load(fsys) }

// Problem is one mistake in a commit, at a place that an editor can jump to.
type Problem struct {
	File         string
	Line, Column int // from 1; 0: the whole file
	Message      string
}

func (p Problem) Error() string {
	if p.Line == 0 {
		return fmt.Sprintf("%s: %s", p.File, p.Message)
	}
	return fmt.Sprintf("%s:%d:%d: %s", p.File, p.Line, p.Column, p.Message)
}

// Problems is every mistake of a commit, in order of file and line.
type Problems []Problem

func (ps Problems) Error() string {
	lines := make([]string, len(ps))
	for i, p := range ps {
		lines[i] = p.Error()
	}
	return strings.Join(lines, "\n")
}
