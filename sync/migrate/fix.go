package migrate

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"regexp"
	"strconv"
	"strings"

	"kedge/artifact/object"
	"kedge/deployments"
)

// decimalMode matches a line with a dest_mode that stretcher reads as a decimal number.
var decimalMode = regexp.MustCompile(`(?m)^dest_mode:[ \t]*([1-9][0-9]*)[ \t]*(#.*)?\r?$`)

// Fix returns the text of in's manifest adapted to kedge, and a description of each change; none: nothing had to be
// changed. Everything else stays, including comments and templates. It doesn't change the strategy, as people have to
// decide whether dest may become a link. It changes
//
//   - dest_mode to octal: 755 is written 0755; a number that is no mode in octal, such as 493, is
//     converted from decimal, here to 0755, too
//   - symlinks to any, if the archive was inspected, and has links that lead out of its tree
//   - a checksum by MD5 or SHA-1 to SHA-256, if the archive was inspected, and the checksum has a line of its own
func Fix(ctx context.Context, objects *object.Client, in Inspection) (text []byte, changed []string, err error) {
	t := string(in.Source.Raw)
	t = decimalMode.ReplaceAllStringFunc(t, func(line string) string {
		digits := decimalMode.FindStringSubmatch(line)[1]
		fixed := "0" + digits
		if mode, err := strconv.ParseUint(digits, 8, 32); err != nil || mode > 0o7777 {
			n, err := strconv.ParseUint(digits, 10, 32)
			if err != nil || n > 0o7777 {
				return line
			}
			fixed = fmt.Sprintf("0%o", n)
		}
		changed = append(changed, fmt.Sprintf("changed dest_mode from %s to %s", digits, fixed))
		return strings.Replace(line, digits, fixed, 1)
	})
	if a := in.Archive; a != nil {
		if len(a.Outside) > 0 && in.Manifest.Symlinks != deployments.SymlinksAny {
			t = add(t, "symlinks: any")
			changed = append(changed, "added symlinks: any, as the archive has links that lead out of its tree")
		}
		if sum := in.Manifest.Checksum; len(sum) == 32 || len(sum) == 40 {
			strong, err := sha256Of(ctx, objects, in.Manifest.Src)
			if err != nil {
				return nil, nil, fmt.Errorf("computing the archive's SHA-256: %w", err)
			}
			line := regexp.MustCompile(`(?mi)^(checksum:[ \t]*["']?)` + sum + `\b`)
			if line.MatchString(t) {
				t = line.ReplaceAllString(t, "${1}"+strong)
				changed = append(changed, "checksum is the archive's SHA-256")
			}
		}
	}
	if len(changed) == 0 {
		return in.Source.Raw, nil, nil
	}
	if _, err := deployments.ParseTemplate([]byte(t), in.Source.URL); err != nil {
		return nil, nil, fmt.Errorf("%s can't be changed line by line, change it by hand: %w", in.Source.Name, err)
	}
	return []byte(t), changed, nil
}

// add appends a field to a manifest's text.
func add(text, field string) string {
	if !strings.HasSuffix(text, "\n") {
		text += "\n"
	}
	return text + field + "\n"
}

func sha256Of(ctx context.Context, objects *object.Client, url string) (string, error) {
	o, err := objects.Stat(ctx, url)
	if err != nil {
		return "", err
	}
	r, err := objects.Read(ctx, o, 0)
	if err != nil {
		return "", err
	}
	sum := sha256.New()
	_, err = io.Copy(sum, r)
	return hex.EncodeToString(sum.Sum(nil)), errors.Join(err, r.Close())
}
