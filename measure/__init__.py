"""What a finished talking video shows: whether the mouth follows the speech, and what changes that should not.

    landmarks    faces in an image, 468 points on each, by MediaPipe's models
    faces        faces through a video: by landmarks, by a given box, or by the part that moves most
    sync         a mouth's opening against speech
    footage      one reading of the frames: a few numbers of each
    quantities   the table of what is measured, in what unit, and what is good
    report       the same as text, JSON and a page with plots

No model of ours is in here; any video can be measured.
"""
