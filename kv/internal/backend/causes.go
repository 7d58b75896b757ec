package backend

import "strings"

// maxCauses bounds how many causes of one outage are distinguished; further ones aren't reported.
const maxCauses = 8

// Causes are the errors seen since the last success, so that each kind is logged once. An outage that begins with a
// refused connection may go on as an expired certificate, which has to be logged, too. The zero value is ready.
type Causes map[string]bool

// FirstOfKind reports whether err is the first of its kind since the last success, and of one of
// the first maxCauses kinds. A nil err is a success: all kinds are forgotten, and the result is
// false. Numbers in err's text, such as ports and times, are ignored.
func (c *Causes) FirstOfKind(err error) bool {
	if err == nil {
		*c = nil
		return false
	}
	kind := strings.Map(func(r rune) rune {
		if r >= '0' && r <= '9' {
			return -1
		}
		return r
	}, err.Error())
	if (*c)[kind] || len(*c) == maxCauses {
		return false
	}
	if *c == nil {
		*c = Causes{}
	}
	(*c)[kind] = true
	return true
}
